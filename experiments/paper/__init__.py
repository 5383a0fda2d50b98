"""One file for each figure or table of the papers; importing this package registers them all."""

from experiments.paper import (
    p18_fig1,
    p18_fig7,
    p18_fig7d,
    p18_fig9,
    p18_tab2,
    p18_thm1,
    p22_fig1,
    p22_fig3,
    p22_fig4_left,
    p22_fig4_right,
    p22_fig5,
    p22_fig7,
    p22_fig24,
    p22_fig27,
    p22_fig28,
    p22_fig29,
)

__all__ = [
    "p18_fig1",
    "p18_fig7",
    "p18_fig7d",
    "p18_fig9",
    "p18_tab2",
    "p18_thm1",
    "p22_fig1",
    "p22_fig3",
    "p22_fig4_left",
    "p22_fig4_right",
    "p22_fig5",
    "p22_fig7",
    "p22_fig24",
    "p22_fig27",
    "p22_fig28",
    "p22_fig29",
]
