//! What the backward pass hands its gradients to.

/// Takes the gradients of a step, parameter by parameter, as backward makes them final.
pub(crate) trait Gradients {
    /// Where backward adds to the gradient of the parameter of that number, which starts from
    /// zeros. Not asked for after [`Gradients::ready`] until the next step.
    fn accumulate(&mut self, parameter: usize) -> &mut [f32];

    /// The gradient of this parameter is final: nothing will be added in this step. Called once
    /// for each parameter and step, for the last layer first.
    fn ready(&mut self, parameter: usize);
}
