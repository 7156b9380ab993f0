"""Codes chosen together: what one weight's code gets wrong, its neighbours' codes make up for, in the type's own grid.

x is what a matrix is multiplied with and H = E[x x^T]. Rounding W to Q costs tr(E H E^T) in what the matrix puts out,
E = W - Q. Nearest codes make every E_ij small; codes chosen together make the sum small.
"""
