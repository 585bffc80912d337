"""Members of an ensemble, rebuilt from torch's own layers."""

from torch import nn


def member(net, index, layer_norm=True, activation=nn.ReLU):
    """Member ``index`` of an ``EnsembleMLP`` as a network of states and actions side by side."""
    modules = []
    for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        linear = nn.Linear(weight.shape[1], weight.shape[2], dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight[index].T.clone(), bias[index, 0].clone()
        modules.append(linear)
        if layer < len(net.weights) - 1:
            if layer_norm:
                modules.append(nn.LayerNorm(weight.shape[2], elementwise_affine=False))
            modules.append(activation())
    return nn.Sequential(*modules)
