"Make it fast: students that need fewer steps, smaller decoders, and where the time goes"
