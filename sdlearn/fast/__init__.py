"Make it fast: fewer steps, cheaper steps, and what each costs"
