package authority

// mutants breaks single rules, so that a test can show that the explorer would
// see it. Only tests of this package can set one; the zero value is the product.
type mutants struct {
	startOutdated      bool // start from a replica that is not UpToDate
	bootKeepsOthers    bool // Booted leaves other replicas UpToDate
	lostKeepsUpToDate  bool // LostSecondary leaves the lost replica UpToDate
	takeOverStopped    bool // a VM recorded stopped is taken over
	syncingClaims      bool // a secondary claims while the record says syncing
	noRunCheck         bool // host names alone decide who is primary or secondary
	ignoreSurvivor     bool // a takeover or start ignores the survivor right
	survivorByOther    bool // the secondary's host may write or remove survivor
	emptyBoots         bool // an empty primary boots without asking the secondary
	notStricter        bool // rules follow the record alone, not swaps on their way
	claimWhileAcking   bool // a claim does not stop acknowledging
	anyRead            bool // a read of any age is believed (cached, not linearizable)
	freeOnClaim        bool // output is free as soon as simplex is claimed
	ackEarly           bool // (driver model) an epoch is acknowledged before it is complete
	duplexEarly        bool // duplex is asked for while output is free
	offInUse           bool // the survivor right is said to be given up while in use
	survivorStale      bool // a survivor right taken up again rests on the old write
	survivorUnread     bool // the survivor right is used without reading its write back
	carryEarly         bool // writes that only the secondary holds are acknowledged before the record says so
	carryLate          bool // and still after this host's replica was recorded again, or may have been
	lossUnrecorded     bool // LostReplica leaves the primary's replica UpToDate
	lossDropsSecondary bool // a primary without a replica of its own goes simplex
	backUnfilled       bool // (driver model) the replica is said to be whole before the copy is
	notDurable         bool // (driver model) output leaves before its flushed write is durable here
}
