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
	Check string
	Level Level
	// Hook, Target and NetNS are where it is, as in [Chain], and Member is the name of
	// the member that it is about; zero for what is on no hook.
	Hook   Hook
	Target string
	NetNS  NetNS
	Member string
	// Text is one line.
	Text string
	// Mend is the command that mends it, for a shell. Empty when there is nothing
	// to do, or no command that does it.
	Mend string
}
