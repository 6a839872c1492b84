"""What training takes per GPU, in memory and in communication, from a config.json alone."""
