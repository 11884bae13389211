"""What people look at: plots, reports, inspection, viewers."""
