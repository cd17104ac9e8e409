"""What a run is made of besides the network: data, loop, meters, files. Never imports `models`."""
