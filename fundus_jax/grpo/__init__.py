"""GRPO: rollouts of a prompt are scored and compared; the policy moves towards the better ones.

The parts, in the order in which a step uses them: `config` (every number of the stage), `rollout` (sampling),
`judge` and `rewards` (the score of a rollout), `advantages` (scores against their group), `loss` (the clipped
objective), `update` and `train` (the loop). `advantages` and `loss` are pure functions of arrays. Nothing is
imported here, so that a part can be used without the others.
"""
