"""What an order's runs add up to: the accuracy matrix and the measures taken from it."""
