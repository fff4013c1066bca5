"""What goes beyond TEAL's paper: chapters, each of which plugs into the core by one seam."""
import model                             # noqa: F401  (first: it sets what torch reads as it loads)
