"""`mergeforge data build`: a structure file and its topic files become training rows."""
