"""What a run is made of besides the network. Never imports `models`."""
