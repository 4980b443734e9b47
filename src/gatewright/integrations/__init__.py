"""Optional libraries, one room each; importing the package imports none of them."""
