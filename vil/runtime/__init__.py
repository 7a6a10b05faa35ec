"""What training, evaluation and the input pipeline stand on; imports of the project `vil.config` alone."""
