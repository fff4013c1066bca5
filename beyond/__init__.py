"""What goes beyond TEAL's paper: chapters, each of which plugs into the core by one seam."""
