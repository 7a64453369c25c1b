"""What goes where: the probe, the search, the plan."""
