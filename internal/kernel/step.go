package kernel

// OnStep, if set, is called at every step that other processes can see. Only tests
// set it, to kill the process there.
var OnStep func(step string)

// Step marks a point where the process may die.
func Step(step string) {
	if OnStep != nil {
		OnStep(step)
	}
}
