"""Faster R-CNN, Mask R-CNN and RetinaNet on this project's ResNets."""
