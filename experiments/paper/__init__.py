"""One file for each figure or table of the papers; importing this package registers them all."""

from experiments.paper import p18_tab2, p18_thm1, p22_fig1, p22_fig3, p22_fig4_left, p22_fig7

__all__ = ["p18_tab2", "p18_thm1", "p22_fig1", "p22_fig3", "p22_fig4_left", "p22_fig7"]
