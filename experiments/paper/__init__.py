"""One file for each figure or table of the papers; importing this package registers them all."""

from experiments.paper import p22_fig3, p22_fig4_left, p22_fig7

__all__ = ["p22_fig3", "p22_fig4_left", "p22_fig7"]
