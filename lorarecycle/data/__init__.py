"""Images and labelled images: decoding, normalising, data sets, class splits."""
