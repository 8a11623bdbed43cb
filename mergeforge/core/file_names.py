"""Names of the files that a merge writes next to the weights."""

RECEIPT = "mergeforge.json"
RECIPE = "mergeforge.yml"
MODEL_CARD = "README.md"
