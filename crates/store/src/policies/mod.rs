//! Which cached expert makes room for the next: one small file per rule. Files here do not import each other; what they
//! share is in `policy` one level up.
