"""Networks in and out: our folders, and networks by name from anywhere."""
