package hook

// An Adoption tells what it changes for others when a program becomes a member.
type Adoption struct {
	// Program is what would be adopted.
	Program Program `json:"program"`
	// Holders are the processes that have the program open. The tool that attached
	// it may be among them; one that has ended is not.
	Holders []HolderProcess `json:"holders"`
	// Effects say what changes, in a sentence each.
	Effects []string `json:"effects"`
	// Back are the shell commands that undo the adoption, in their order. On XDP and on
	// cgroups they work while nobody else has joined.
	Back []string `json:"back"`
}
