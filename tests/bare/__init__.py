"""A clean clone on bare machines of the distributions that README names."""
