"""What the project measures about itself; most files here are scripts of their own."""
