package kernel

// OnStep, when set, is called before every step that others can see. Tests
// set it to die there; nothing else does.
var OnStep func(step string)

// Step marks a place where a process may die.
func Step(step string) {
	if OnStep != nil {
		OnStep(step)
	}
}
