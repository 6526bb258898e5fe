package scsi

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The types of a persistent reservation (SPC-4 6.15.3.3).
const (
	writeExclusive                        = 1
	exclusiveAccess                       = 3
	writeExclusiveRegistrantsOnly         = 5
	exclusiveAccessRegistrantsOnly        = 6
	writeExclusiveAllRegistrants          = 7
	exclusiveAccessAllRegistrants         = 8
	reservationTypes               uint16 = 1<<writeExclusive | 1<<exclusiveAccess | 1<<writeExclusiveRegistrantsOnly |
		1<<exclusiveAccessRegistrantsOnly | 1<<writeExclusiveAllRegistrants | 1<<exclusiveAccessAllRegistrants
)

// maxRegistrations bounds what initiators can have a unit remember.
const maxRegistrations = 512

// A registration is a key of an I_T nexus, which lasts longer than the nexus.
type registration struct {
	Initiator string `json:"initiator"`        // the name of its port
	Target    string `json:"target,omitempty"` // the name of the target port; "": any (ALL_TG_PT)
	Port      uint16 `json:"port,omitempty"`   // the target port's relative identifier
	Key       uint64 `json:"key"`
}

// of says whether the registration is that of a nexus of p.
func (r registration) of(p Port) bool {
	return strings.EqualFold(r.Initiator, p.Name) && (r.Target == "" || r.Target == p.Target)
}

// same says whether two registrations are of the same nexus.
func (r registration) same(o registration) bool {
	return strings.EqualFold(r.Initiator, o.Initiator) && r.Target == o.Target
}

// A persistence is the persistent reservation of a unit with all registrations (SPC-4 5.13). Its fields in JSON are what
// a Keeper keeps.
type persistence struct {
	Registrations []registration `json:"registrations"` // oldest first
	// Type is the reservation's type; 0: there is none.
	Type byte `json:"type,omitempty"`
	// Holder is the index of the registration that holds it, where the type is none of all registrants.
	Holder int `json:"holder,omitempty"`

	generation uint32 // PRGENERATION, which begins anew with the process (SPC-4 6.15.2)
	keep       bool   // APTPL
}

func (p *persistence) clone() *persistence {
	c := *p
	c.Registrations = slices.Clone(p.Registrations)
	return &c
}

// find is the index of the registration of a nexus; -1: it has none.
func (p *persistence) find(port Port) int {
	return slices.IndexFunc(p.Registrations, func(r registration) bool { return r.of(port) })
}

func allRegistrants(kind byte) bool {
	return kind == writeExclusiveAllRegistrants || kind == exclusiveAccessAllRegistrants
}

func registrantsOnly(kind byte) bool {
	return kind == writeExclusiveRegistrantsOnly || kind == exclusiveAccessRegistrantsOnly
}

// holds says whether a registration holds the reservation.
func (p *persistence) holds(i int) bool {
	return i >= 0 && p.Type != 0 && (allRegistrants(p.Type) || p.Holder == i)
}

// bars is which commands of a nexus the reservation keeps out (SPC-4 tables 66 and 67).
func (p *persistence) bars(port Port) uint32 {
	if p.Type == 0 {
		return 0
	}
	i := p.find(port)
	if p.holds(i) || i >= 0 && registrantsOnly(p.Type) {
		return 0
	}
	switch p.Type {
	case exclusiveAccess, exclusiveAccessRegistrantsOnly, exclusiveAccessAllRegistrants:
		return reads | writes
	}
	return writes
}

// release ends the reservation.
func (p *persistence) release() { p.Type, p.Holder = 0, 0 }

// remove takes registrations away, and the reservation of one that holds it; one of all registrants ends with the last.
func (p *persistence) remove(gone func(i int) bool) {
	var kept []registration
	holder, held := 0, false
	for i, r := range p.Registrations {
		if gone(i) {
			continue
		}
		if i == p.Holder {
			holder, held = len(kept), true
		}
		kept = append(kept, r)
	}
	p.Registrations = kept
	p.Holder = holder
	if allRegistrants(p.Type) && len(kept) == 0 || !allRegistrants(p.Type) && !held {
		p.release()
	}
	if allRegistrants(p.Type) {
		p.Holder = 0
	}
}

// maxKept bounds what a Keeper gives back, in bytes.
const maxKept = 1 << 20

// load reads what was kept. What is damaged is an error: to begin without the reservations would let those write whom they
// keep out.
func (p *persistence) load(k Keeper) error {
	b, err := k.Load()
	if err != nil {
		return fmt.Errorf("loading persistent reservations: %w", err)
	}
	if len(b) == 0 {
		return nil
	}
	if len(b) > maxKept {
		return damaged(k, fmt.Errorf("%d bytes, more than %d", len(b), maxKept))
	}
	if err := json.Unmarshal(b, p); err != nil {
		return damaged(k, err)
	}
	if err := p.check(); err != nil {
		return damaged(k, err)
	}
	p.keep = len(p.Registrations) > 0
	return nil
}

// damaged says that what k gave back is not what it was given. A Keeper with a method Damaged knows better where that lies and
// what helps.
func damaged(k Keeper, cause error) error {
	if d, ok := k.(interface{ Damaged(cause error) error }); ok {
		cause = d.Damaged(cause)
	}
	return fmt.Errorf("reading persistent reservations: %w", cause)
}

func (p *persistence) check() error {
	if len(p.Registrations) > maxRegistrations {
		return fmt.Errorf("%d registrations: more than %d", len(p.Registrations), maxRegistrations)
	}
	for _, r := range p.Registrations {
		if r.Initiator == "" || r.Key == 0 || len(r.Initiator) > maxName || len(r.Target) > maxName {
			return fmt.Errorf("registration of %.40q with key %#x: not possible", r.Initiator, r.Key)
		}
	}
	switch {
	case p.Type == 0 && p.Holder == 0:
		return nil
	case !validType(p.Type):
		return fmt.Errorf("reservation of type %d: no such type", p.Type)
	case p.Holder < 0 || p.Holder >= len(p.Registrations):
		return errors.New("reservation without a registration that holds it")
	}
	return nil
}

func validType(kind byte) bool { return kind < 16 && reservationTypes&(1<<kind) != 0 }

// save keeps the state, or its absence.
func (p *persistence) save(k Keeper) error {
	kept := p
	if !p.keep {
		kept = &persistence{}
	}
	b, err := json.Marshal(kept)
	if err != nil {
		return fmt.Errorf("writing persistent reservations: %w", err)
	}
	if err := k.Save(b); err != nil {
		return fmt.Errorf("keeping persistent reservations: %w", err)
	}
	return nil
}
