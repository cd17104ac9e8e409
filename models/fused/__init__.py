"""BatchNorm, ECA, addition and ReLU as one operation, on the CPU and on CUDA."""
