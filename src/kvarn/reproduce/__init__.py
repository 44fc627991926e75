"""What papers claim and what comes of it here: one folder or file per paper, and the contract they share."""
