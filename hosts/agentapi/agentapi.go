// Package agentapi is what an agent and the server say to each other: JSON over HTTP under /node/v1/, and bytes by
// digest under /blobs/. The agent speaks first, always.
//
//	POST /node/v1/hello       Hello  -> Assignment          once per boot, and again whenever the server asks for it
//	GET  /node/v1/assignment  ?mac=MAC&after=VERSION&wait=SECONDS -> Assignment
//	                                                        returns at once if its version is not VERSION, else when it changes or time is up
//	POST /node/v1/report      Report -> ReportReply         every few seconds, and at each stage
//	POST /node/v1/delta       DeltaAnswer                   where a ReportReply asked for it
//	GET  /blobs/sha256/HEX    bytes, with Range
package agentapi

import (
	"time"

	"github.com/troupe-dev/troupe/internal/digest"
)

// Identity is how a machine is known.
type Identity struct {
	MAC    string `json:"mac"` // of the interface that it booted from; lower case, colons
	UUID   string `json:"uuid,omitempty"`
	Serial string `json:"serial,omitempty"`
}

// Hello is the first thing that an agent says after it has a network.
type Hello struct {
	Identity
	BootID    string        `json:"bootID"` // from the kernel's command line
	Agent     string        `json:"agent"`  // its version
	Kernel    digest.Digest `json:"kernel"` // the kernel that was booted, from the command line
	Inventory Inventory     `json:"inventory"`
}

// Inventory is what a machine is made of.
type Inventory struct {
	CPU    CPU    `json:"cpu"`
	Memory int64  `json:"memory"` // bytes
	Disks  []Disk `json:"disks"`
	NICs   []NIC  `json:"nics"`
	SMBIOS SMBIOS `json:"smbios"`
	// Firmware is "bios" or "uefi".
	Firmware string `json:"firmware"`
}

// CPU is a machine's processors.
type CPU struct {
	Model   string `json:"model"`
	Arch    string `json:"arch"` // as uname -m has it
	Sockets int    `json:"sockets"`
	Cores   int    `json:"cores"`
	Threads int    `json:"threads"`
}

// Disk is a block device of a machine.
type Disk struct {
	Name   string `json:"name"` // "sda"
	Size   int64  `json:"size"` // bytes
	Model  string `json:"model,omitempty"`
	Serial string `json:"serial,omitempty"`
	WWN    string `json:"wwn,omitempty"`
	Rotary bool   `json:"rotary,omitempty"`
	// Holds says what is on it: "blank", "troupe" (our cache), or what was found, e.g. "gpt", "ext4".
	Holds string `json:"holds"`
	// Boots says that firmware can start it: it has an EFI system partition of ours.
	Boots bool `json:"boots,omitempty"`
}

// NIC is a network interface of a machine.
type NIC struct {
	Name   string `json:"name"`
	MAC    string `json:"mac"`
	Driver string `json:"driver,omitempty"`
	Speed  int    `json:"speed,omitempty"` // Mbit/s; 0 where the driver does not say
	Up     bool   `json:"up"`              // it has a carrier
}

// SMBIOS is what the firmware says of the machine (SMBIOS types 0, 1 and 2).
type SMBIOS struct {
	Vendor  string `json:"vendor,omitempty"`
	Product string `json:"product,omitempty"`
	Serial  string `json:"serial,omitempty"`
	UUID    string `json:"uuid,omitempty"`
	Board   string `json:"board,omitempty"`
	BIOS    string `json:"bios,omitempty"`
}

// State is what the server wants of a machine.
type State string

const (
	// Unclaimed says that no host declares this machine. Report the inventory, write nothing, wait.
	Unclaimed State = "unclaimed"
	// Waiting says that a host declares it, but its release is not there yet (Reason says why). Wait; a running role goes on.
	Waiting State = "waiting"
	// Assigned says to run Release.
	Assigned State = "assigned"
)

// An Assignment is what the server wants of a machine now.
type Assignment struct {
	// Version changes whenever anything below does; opaque to the agent.
	Version string `json:"version"`
	State   State  `json:"state"`
	Reason  string `json:"reason,omitempty"`

	Host       string `json:"host,omitempty"`
	Generation uint64 `json:"generation,omitempty"`
	Role       string `json:"role,omitempty"`
	// Release is what Manifest has. On the wire there is only the latter: see Sign and Open.
	Release  *Release  `json:"release,omitempty"`
	Manifest *Manifest `json:"manifest,omitempty"`
	Node     Node      `json:"node,omitzero"`
	// ISCSI, where it is set, is where the images and the node delta are, in place of a cache on a disk of the machine.
	ISCSI *ISCSI `json:"iscsi,omitempty"`
	// RAM says to keep images and node delta in memory, and to use no disk.
	RAM    bool    `json:"ram,omitempty"`
	Disk   Disks   `json:"disk,omitzero"`
	Cache  Cache   `json:"cache,omitzero"`
	Checks []Check `json:"checks,omitempty"`
	// Fresh says to begin with a new node delta at each boot.
	Fresh bool `json:"fresh,omitempty"`
	// Persist are directories of the root that outlive the release: absolute and clean.
	Persist []string `json:"persist,omitempty"`
	// Delta is what an operator wants to be dropped of the node delta; nil for nothing.
	Delta *DeltaOrder `json:"delta,omitempty"`
	// HealthyWithin is how long after the start of its services a node may take until all checks have passed once, in
	// nanoseconds; 0 means DefaultHealthyWithin.
	HealthyWithin time.Duration `json:"healthyWithin,omitempty"`
	// Activate is how a running node goes to Release: by "kexec", where it can, else by a reboot.
	Activate string `json:"activate,omitempty"`
	// Agent is the initramfs archive with the server's agent. It is no part of the release: a new one alone reboots nobody.
	Agent Blob `json:"agent,omitzero"`
	// Loaders are what firmware starts from the machine's own disk; nil where the server has none.
	Loaders *Loaders `json:"loaders,omitempty"`
}

// Restart is the Activate of a role whose nodes take up other apps as they run: where nothing else differs.
const Restart = "restart"

// Kexec is the Activate of a role whose nodes start the next kernel without the firmware.
const Kexec = "kexec"

// Loaders are the programs that boot a machine from its own disk. They look the same on each machine.
type Loaders struct {
	EFI  Blob `json:"efi"`  // a program of UEFI, for x64
	MBR  Blob `json:"mbr"`  // GRUB's boot.img: the first sector of a disk that a BIOS boots, 512 bytes
	Core Blob `json:"core"` // GRUB's core.img, which that sector starts
}

// ISCSI is the target that a machine without a disk runs from.
type ISCSI struct {
	Port      uint16 `json:"port"` // of the portal; its address is that of the server
	Target    string `json:"target"`
	Initiator string `json:"initiator"`
	// User and Secret prove the machine to the target, MutualUser and MutualSecret the target to the machine (CHAP).
	User         string `json:"user"`
	Secret       string `json:"secret"`
	MutualUser   string `json:"mutualUser"`
	MutualSecret string `json:"mutualSecret"`
	// The LUNs: Base and Delta hold the images of the release, read-only; Node is a disk for the node delta, blank at first.
	Base  uint16 `json:"base"`
	Delta uint16 `json:"delta"`
	Node  uint16 `json:"node"`
	// Disk names what is behind Node. A node that runs from another one reboots: its disk was reset.
	Disk string `json:"disk"`
}

// DefaultHealthyWithin is the deadline of a release to become healthy.
const DefaultHealthyWithin = 10 * time.Minute

// A Blob is immutable bytes that the server has.
type Blob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"` // bytes
}

// An Image is a file system with its dm-verity tree behind it, in one file, which its Blob names (package
// internal/verity draws it).
type Image struct {
	Blob
	Data int64  `json:"data"` // bytes of the file system, a whole number of blocks
	Root string `json:"root"` // root hash of the tree: 64 lower-case hex digits
	// Chunks is the index of the image's content-defined chunks; the zero Blob where there is none.
	Chunks Blob `json:"chunks,omitzero"`
}

// A Release is the bytes of a role.
type Release struct {
	ID     digest.Digest `json:"id"`
	Base   Image         `json:"base"`
	Delta  Image         `json:"delta"`
	Kernel digest.Digest `json:"kernel"` // a machine that runs another one must boot again to run this release
	// KernelBlob and Modules are the kernel and the initramfs archive with its modules, for a machine that boots from its own
	// disk or by kexec; the zero Blob for a release that no agent runs.
	KernelBlob Blob `json:"kernelBlob,omitzero"`
	Modules    Blob `json:"modules,omitzero"`
	// KernelArgs are the role's own arguments.
	KernelArgs []string `json:"kernelArgs,omitempty"`
	// Apps are mounted in the root, and run, sorted by name.
	Apps []App `json:"apps,omitempty"`
	// OS names the release without its apps, where it has some. Releases with the same OS share their node delta, and a node
	// goes from one to the other without a reboot.
	OS digest.Digest `json:"os,omitempty"`
}

// An App is an application: a read-only image of its own, and what is done with it.
type App struct {
	Name  string   `json:"name"`
	Image Image    `json:"image"`
	Mount string   `json:"mount"`           // the directory in the root where it is mounted
	Exec  []string `json:"exec,omitempty"`  // of its service, the first word a path in the image or absolute; none: it has no service
	Env   []string `json:"env,omitempty"`   // of its service, "NAME=value"
	User  string   `json:"user,omitempty"`  // of its service; "" is root
	Root  bool     `json:"root,omitempty"`  // its service sees the image as its root file system
	Data  string   `json:"data"`            // its data directory is left over boots and releases ("keep"), or emptied at each boot ("fresh")
	Delta string   `json:"delta,omitempty"` // what is written where it is mounted is left over boots ("keep"), or dropped ("fresh"); "": nothing can be
}

// Images are all images of r: its base, its delta and those of its apps.
func (r *Release) Images() []Image {
	out := []Image{r.Base, r.Delta}
	for _, a := range r.Apps {
		out = append(out, a.Image)
	}
	return out
}

// Blobs are the files of all images of r.
func (r *Release) Blobs() []Blob {
	var out []Blob
	for _, i := range r.Images() {
		out = append(out, i.Blob)
	}
	return out
}

// System names what a node has to boot for r: all of it but for the apps.
func (r *Release) System() digest.Digest {
	if r.OS != "" {
		return r.OS
	}
	return r.ID
}

// Node is what only this host has.
type Node struct {
	Hostname string `json:"hostname"`
	Domain   string `json:"domain,omitempty"`
	// Digest names Files; a node delta belongs to one release and one digest.
	Digest digest.Digest   `json:"digest"`
	Files  map[string]File `json:"files,omitempty"` // by absolute path
}

// A File is a regular file that a node delta starts with.
type File struct {
	Content string `json:"content"`
	Mode    uint32 `json:"mode"`
	UID     uint32 `json:"uid,omitempty"`
	GID     uint32 `json:"gid,omitempty"`
}

// Disks says which disk may hold the cache.
type Disks struct {
	Take   bool   `json:"take,omitempty"` // also one that is not blank
	Device string `json:"device,omitempty"`
}

// Cache says how the cache is filled.
type Cache struct {
	Rate int64 `json:"rate,omitempty"` // bytes a second that staging may take from the network; 0: as many as come
}

// A Check is one condition of health; exactly one of HTTP, TCP, Unit and Exec is set.
type Check struct {
	HTTP    *HTTPCheck    `json:"http,omitempty"`
	TCP     *TCPCheck     `json:"tcp,omitempty"`
	Unit    string        `json:"unit,omitempty"`
	Exec    []string      `json:"exec,omitempty"`
	Every   time.Duration `json:"every"`   // nanoseconds
	Timeout time.Duration `json:"timeout"` // nanoseconds
}

// HTTPCheck wants a GET on the node itself to be answered with Status.
type HTTPCheck struct {
	Port   uint16 `json:"port"`
	Path   string `json:"path"`
	Status int    `json:"status"`
}

// TCPCheck wants a port of the node to accept a connection.
type TCPCheck struct {
	Port uint16 `json:"port"`
}

// A Stage is how far an agent came with a boot, or with staging a release while another one runs.
type Stage string

// The stages of a boot in their order, after netboot's own.
const (
	StageAgent   Stage = "agent-up"    // the agent runs and has a network
	StageWait    Stage = "wait"        // it has nothing to run: unclaimed, or the release is being built
	StageCache   Stage = "cache"       // the cache is mounted; made, where the disk was blank
	StageFetch   Stage = "fetch"       // all that the release needs is in the cache and verified
	StageMount   Stage = "mount"       // base, role delta and node delta are mounted as one root
	StageSwitch  Stage = "switch-root" // the OS's init is about to run
	StageService Stage = "service"     // the agent runs as a service of the OS
	StageHealthy Stage = "healthy"     // every check passed
	StageStage   Stage = "stage"       // another release was fetched in the background
	StageReboot  Stage = "reboot"      // the node reboots to activate a release
	StageStay    Stage = "stay"        // that reboot was called off: what runs is wanted again
	// StageBootable: the machine's own disk boots what runs, without the server; Detail says what was written, or why not.
	StageBootable Stage = "bootable"
	StageAlone    Stage = "alone"  // the server was not found, and a release of the cache is booted without it
	StageBad      Stage = "bad"    // the release is not tried again: Detail says why
	StageFailed   Stage = "failed" // it cannot go on without somebody's help: Detail says why
)

// A Mark is one stage reached, in the agent's own time.
type Mark struct {
	Stage  Stage         `json:"stage"`
	At     time.Duration `json:"at"` // nanoseconds since the kernel started (CLOCK_BOOTTIME): a node's wall clock may be wrong
	Detail string        `json:"detail,omitempty"`
	Bytes  int64         `json:"bytes,omitempty"` // image bytes fetched over the network to reach it
}

// A Report is how a node is.
type Report struct {
	Identity
	BootID string        `json:"bootID"`
	Uptime time.Duration `json:"uptime"` // nanoseconds since the kernel started, when the report was made
	Marks  []Mark        `json:"marks,omitempty"`
	Agent  string        `json:"agent"`

	// Running is what the node has switched to; nil before that.
	Running *Running `json:"running,omitempty"`
	// Staged is the release that is whole in the cache and waits for a reboot; "" for none.
	Staged digest.Digest   `json:"staged,omitempty"`
	Fetch  *Progress       `json:"fetch,omitempty"`  // a transfer under way
	Cached []digest.Digest `json:"cached,omitempty"` // whole, verified images in the cache
	// Session is how the session is that the root depends on; nil where the node runs from a disk of its own.
	Session *Session `json:"session,omitempty"`
	// Bad are the releases that the node does not run though it may be told to, newest first; 8 at most.
	Bad []BadRelease `json:"bad,omitempty"`
	// Good is the release that the node goes back to when what is wanted fails; "" for none.
	Good digest.Digest `json:"good,omitempty"`
	// Warnings are what the node noticed in this boot and got past, for people; 20 at most.
	Warnings []string `json:"warnings,omitempty"`
	// Changes is how much the node changed over its release; nil where it did not count that yet.
	Changes *DeltaCount `json:"changes,omitempty"`
	// Error is what keeps the node from its assignment, "" when nothing does. It may be something that the node expects to
	// get past by trying again; where it does not, StageFailed is marked, too.
	Error string `json:"error,omitempty"`
}

// A BadRelease is one that did not work on a node.
type BadRelease struct {
	Host       string        `json:"host"`
	Role       string        `json:"role"`
	Generation uint64        `json:"generation"`
	Release    digest.Digest `json:"release"`
	Node       digest.Digest `json:"node"` // of its files
	Why        string        `json:"why"`
	When       time.Time     `json:"when"` // by the node's own clock
	// Again says that it was good before, and is tried once more when what runs in its place was healthy for a while.
	Again bool `json:"again,omitempty"`
}

// Running is what a node runs.
type Running struct {
	Host       string        `json:"host"`
	Role       string        `json:"role"`
	Generation uint64        `json:"generation"`
	Release    digest.Digest `json:"release"`
	System     digest.Digest `json:"system,omitempty"` // of that release
	Base       digest.Digest `json:"base"`
	Delta      digest.Digest `json:"delta"`
	Node       digest.Digest `json:"node"`
	Health     Health        `json:"health"`
	// Order is the DeltaOrder that the node delta was brought up to.
	Order string `json:"order,omitempty"`
}

// Health is the outcome of the checks.
type Health struct {
	Healthy bool     `json:"healthy"`
	Failing []string `json:"failing,omitempty"` // one line for each check that does not pass
}

// Session is how a node's iSCSI session is.
type Session struct {
	Up     bool   `json:"up"`
	Logins int    `json:"logins"`          // in this boot; each after the first was a recovery
	Error  string `json:"error,omitempty"` // why it is not up
}

// Progress is a transfer under way.
type Progress struct {
	Release digest.Digest `json:"release"`
	Done    int64         `json:"done"`  // bytes
	Total   int64         `json:"total"` // bytes
}

// ReportReply tells the agent what to do beyond going on.
type ReportReply struct {
	// Version is of the current assignment; where it is not the agent's, the agent asks for it.
	Version string `json:"version"`
	// Hello asks for a Hello: the server does not know this machine (any more). The marks of the report are not
	// acknowledged then: they are sent again, and the server leaves out those that it has.
	Hello bool `json:"hello,omitempty"`
	// Diff asks for a DeltaAnswer with this ID; "" for none.
	Diff string `json:"diff,omitempty"`
}

// An Error is the body of every answer that is not 2xx.
type Error struct {
	Message string `json:"error"`
}
