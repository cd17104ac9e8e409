"""Training and evaluating detectors on data in COCO's format."""
