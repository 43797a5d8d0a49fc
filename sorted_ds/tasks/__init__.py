"""What a network is trained for: how a forward pass becomes sums, and which metrics are shown."""
