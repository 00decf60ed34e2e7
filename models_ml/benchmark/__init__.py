"""Next-item prediction under published protocols: what our methods are worth beside the literature's figures."""
