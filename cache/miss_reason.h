// MissReason: why the first uncached token of a prompt was not cached. Part of every reply's usage
// and a metric label.
#pragma once

namespace coppice {

// Values follow coppice.v1.MissReason.
enum class MissReason {
  kNone = 0,       // everything that could be cached was
  kNoneStored,     // never seen in this namespace, or long forgotten
  kEvicted,        // was stored here, but is gone: made room, expired or flushed
  kPolicyVersion,  // stored under another policy version
  kNamespace,   // stored by the same tenant under another model, adapter or KV layout. What other
                // tenants have stored
                //   reads kNoneStored: a reason must not tell one tenant what another has sent
  kBelowBlock,  // what was left to match is shorter than one block
  kNoStateCheckpoint,  // KV matched further than any recurrent state
  kOptedOut,           // skip_read
  kRoutedElsewhere,    // another replica holds it
};

}  // namespace coppice
