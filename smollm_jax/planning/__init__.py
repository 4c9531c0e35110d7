"""Planning: does a run fit devices that are not here, and how fast would it be?"""
