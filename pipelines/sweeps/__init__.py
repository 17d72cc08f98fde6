"""What tune.py is made of: what trials share, a trial, the driver that gives them out, what is told of them."""
