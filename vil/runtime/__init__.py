"""Building blocks of training, evaluation and the input pipeline; they import `vil.config`,
`vil.errors` and `vil.validation` alone."""
