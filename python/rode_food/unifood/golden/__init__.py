"""The golden test set: labels that agree with the USDA's tables, categories thinned, a person's last word."""
