def constrain(x,*a): return x
