"""Parameters and FLOPs by named conventions, beside the published figures."""
