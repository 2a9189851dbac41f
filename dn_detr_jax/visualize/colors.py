"""Colors of drawings: those of Okabe and Ito, which color-blind people tell apart.

https://jfly.uni-koeln.de/color/
"""

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
PREDICTED, TRUE = ORANGE, SKY
BY_OBJECT = (ORANGE, SKY, GREEN, YELLOW, PURPLE, BLUE)
BY_RUN = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
