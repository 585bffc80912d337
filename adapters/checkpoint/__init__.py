"""How a saved policy is read from its folder; what is wrong with one is a ``UserError`` with the mend."""
