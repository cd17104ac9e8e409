"""Names the colours of all diagrams, in a file without matplotlib, which is slow to import.

They are those of Okabe and Ito, which people with any form of colour blindness can tell apart.
"""

MAIN, SECOND, GREY = "#0072B2", "#D55E00", "#6b7280"
CURVES = (MAIN, SECOND, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5c4b8a", "#000000")
DIFFERENCES = "RdBu_r"  # matplotlib's map of colours around a middle
