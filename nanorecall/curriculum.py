"""A curriculum: stages of training before the task itself, each left when it is learned.

Which stage a step belongs to depends on the losses so far. So the steps at which stages ended are
part of a run's state: they are written into checkpoints, and are the same on all ranks.
"""

OLD = 0.7  # weights in the running mean of the loss: about the last five steps count
NEW = 0.3
LARGEST = 100.0  # nats; a loss that is NaN counts as this


class Curriculum:
    """Stages with a maximum of steps. With max_loss, a stage also ends when its loss is below that.

    The loss is a running mean over the steps of the stage, in nats.
    """

    def __init__(self, max_steps, max_loss=0.0):
        """max_steps: of each stage, a list. max_loss 0: each stage takes all its steps."""
        self.max_steps = list(max_steps)
        self.max_loss = max_loss
        self.state = {"ends": [], "mean_loss": LARGEST}

    def stage(self, step):
        """A training step -> its stage, and its number within that stage, both from 0.

        The task itself is the stage after the last one.
        """
        start = 0
        for stage, max_steps in enumerate(self.max_steps):
            end = start + max_steps
            if stage < len(self.state["ends"]):
                end = self.state["ends"][stage]
            if step < end:
                return stage, step - start
            start = end
        return len(self.max_steps), step - start

    def ends(self, last_step):
        """The steps before last_step with which another stage, or the task, began."""
        ends = list(self.state["ends"])
        for max_steps in self.max_steps[len(ends) :]:
            start = ends[-1] if ends else 0
            ends.append(start + max_steps)
        return [end for end in ends if end < last_step]

    def is_learning(self, step):
        """Does the end of this step's stage depend on its loss?"""
        return self.max_loss > 0 and self.stage(step)[0] < len(self.max_steps)

    def end_step(self, step, loss):
        """Record the loss of a step, in nats. Its stage may end with it. Steps come in order."""
        stage, number = self.stage(step)
        if not loss < LARGEST:
            loss = LARGEST
        mean = loss
        if number > 0:
            mean = OLD * self.state["mean_loss"] + NEW * loss
        self.state["mean_loss"] = mean
        is_learned = mean < self.max_loss
        if is_learned or number + 1 == self.max_steps[stage]:
            self.state["ends"].append(step + 1)

    def decay_start(self, step):
        """The step from which the learning rate decays, as far as it is known at `step`.

        That is the first step of the task, if stages end when they are learned, and else step 0.
        """
        if self.max_loss == 0:
            return 0
        stage, number = self.stage(step)
        return step - number if stage == len(self.max_steps) else step
