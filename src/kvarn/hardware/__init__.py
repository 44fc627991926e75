"""What devices are: accelerators, links and model shapes as data, and closed forms of the time they take."""
