"""The method on tensors and U-Nets: what is cached, the adapters, reading features, putting adapters in, guidance."""
