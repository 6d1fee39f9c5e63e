package hook

// A Level says how bad a [Finding] is.
type Level string

const (
	LevelOK     Level = "ok"     // a check that found nothing
	LevelNote   Level = "note"   // worth knowing
	LevelDrift  Level = "drift"  // not as it was meant to be
	LevelBroken Level = "broken" // does not work, or harms
)

// A Finding is what one check of the doctor has found.
type Finding struct {
	// Check is what was looked at: short and stable.
	Check string `json:"check"`
	Level Level  `json:"level"`
	// Hook, Target and NetNS say where the finding is, as in [Chain]. Member is the
	// name of the member that it is about. They are zero for what is on no hook.
	Hook   Hook   `json:"hook,omitempty"`
	Target string `json:"target,omitempty"`
	NetNS  NetNS  `json:"netns"`
	Member string `json:"member,omitempty"`
	// Text says in one line what was found.
	Text string `json:"text"`
	// Mend is the shell command that mends it. It is empty when nothing has to be done,
	// and when no command can do it.
	Mend string `json:"mend,omitempty"`
}
