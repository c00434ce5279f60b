"""The attention engine: watch a layer, turn activations and gradients into maps, leave no trace."""
